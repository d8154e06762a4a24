"""The shipped tasks: data, teachers and the scripts that made them."""
