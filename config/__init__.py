"""Configuration: settings from the environment, the catalogue from TOML, logging. No I/O happens at import."""
