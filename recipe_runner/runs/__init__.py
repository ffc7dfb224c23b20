"""Run folders on disk. Nothing here imports the ML stack."""
