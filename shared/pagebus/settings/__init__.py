"""Settings: one frozen struct a service, filled from flags, environment and a TOML file."""
