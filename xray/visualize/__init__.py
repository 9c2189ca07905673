"""Pictures of what a model keeps, attends to and reconstructs."""
