"""Does the suite notice a broken ledger? Mutants as data, and the script that tries them."""
