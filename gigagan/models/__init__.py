"""Networks: the ones we train, and the pretrained ones that condition and judge them."""
