"""Demo (`make demo`) and its data: drawn images with questions about them."""
