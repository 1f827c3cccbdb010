"""What is known of models: which layers are BatchNorm, how to choose among them, to call a model, to put one back."""
