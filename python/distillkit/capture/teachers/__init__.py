"""Teachers that score documents: one interface (`base`), one module per engine."""
