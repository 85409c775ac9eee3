"""What the verbs of `opd` beyond LightningCLI's do."""
