"""KnowledgeEditor: an LSTM reads the edit and scales its gradient, row by row and column by column (De Cao et al. 2021)."""
