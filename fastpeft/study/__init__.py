"""Studies: several training runs from one YAML file, their table and their figures."""
