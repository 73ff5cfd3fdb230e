"""Labelled texts of ready guards, with a card for each; ``sidelight.data.guards`` reads them."""
