"""The bundled claim verifier: a small multilingual BERT classifier (SUPPORTS / REFUTES), its facts, and the recipe that made it."""
