"""Configuration: settings from the environment, the catalogue from TOML, logging. Importing it does no I/O."""
