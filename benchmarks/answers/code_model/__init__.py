"""Parts of the training of the bundled model of word pieces (`train_code_model`)."""
