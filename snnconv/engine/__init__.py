"""Run a spiking network: one interface, several engines, the same bits."""
