"""What stages cost: counted, measured and simulated, and the cut that balances them."""
