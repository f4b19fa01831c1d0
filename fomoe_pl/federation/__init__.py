"""Federation: placement, rounds, averaging, wire and checkpoint. Knows no model class."""
