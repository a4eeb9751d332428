"""What people look at: the card of a reader, plots of plans and passes, the recorder of batches."""
