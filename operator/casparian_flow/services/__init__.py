"""What finds files and wires plugins: Scout, routing, Architect and publisher."""
