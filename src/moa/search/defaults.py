"""What a search takes unless it is told otherwise. The command line shows these, so nothing heavy is imported here."""

ITEMS, VALIDATION_ITEMS = 24, 12  # of each length and source
