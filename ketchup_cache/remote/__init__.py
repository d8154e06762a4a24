"""Caches elsewhere: on a shared disk, in an object store, behind a web server, on the Hugging Face Hub.

`base.Remote` is what each of them can do; `opening.open_remote` picks one by its address.
"""
