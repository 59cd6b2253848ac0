"""Every knob of every stage as frozen, typed models. Imports neither torch nor any other part of the package."""
