"""HTTP only: routes, request bodies, schemas and the error table."""
