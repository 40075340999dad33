"""`tandem data make` and `tandem data check`: WebDataset shards with an index."""
