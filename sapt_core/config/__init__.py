"""An experiment as its YAML file and the command line say it, and what can be said against it before it runs."""
