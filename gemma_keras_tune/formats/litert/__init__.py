"""Files for LiteRT-LM."""
