"""`python -m casparian_worker.provision`: see casparian_flow/engine/provision.py."""

from casparian_flow.engine.provision import main

if __name__ == "__main__":
    main()
