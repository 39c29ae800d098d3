"""Teachers that score documents: one interface (`base`), one module an engine."""
