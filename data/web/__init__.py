"""What is asked of other people's servers, and what is taken from them."""
