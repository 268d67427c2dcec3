"""Whether a machine can run ddrl: facts are gathered, then judged, then shown."""
