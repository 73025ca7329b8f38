"""The networks: no loss, no teacher, no queue and no drawing of masks."""
