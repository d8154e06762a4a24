"""Settings of published experiments, one YAML file each."""
