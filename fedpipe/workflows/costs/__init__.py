"""What stages cost: counted, measured, simulated; and the cut that balances them."""
