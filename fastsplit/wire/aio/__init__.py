"""The asyncio front: one event loop waits for all."""
