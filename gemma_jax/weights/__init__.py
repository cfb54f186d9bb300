"""What may stand in a Param in the place of an array, and the products with it."""
