"""The frozen player answers: `hf` is built in; another engine is another module with the same `play`."""
