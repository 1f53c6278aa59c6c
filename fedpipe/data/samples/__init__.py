"""The packaged text and vocabulary, with their attribution and the script that makes them."""
