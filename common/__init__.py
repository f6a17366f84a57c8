"""Everything the model folders share. Knows no network, no layer name and no flag's value."""
