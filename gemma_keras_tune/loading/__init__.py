"""Loading of models: from a name, a folder or a file to a KerasHub model."""
