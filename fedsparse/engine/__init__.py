"""Engines: Flower Grids that run the clients."""
