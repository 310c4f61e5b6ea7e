"""The seeded simulation: the real services on a bad bus, in virtual time; one seed, one run."""
