"""What the code of transformers' models does: a forward as a tree, and where the last hidden state goes."""
