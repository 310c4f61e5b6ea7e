"""One tensor operation a file, each with its plain-torch reference. Knows no model, no row and no bus."""
