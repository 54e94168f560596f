from casparian_flow.services.scout import Scout
from casparian_flow.db.access import get_engine
from casparian_flow.db.models import SourceRoot
from casparian_flow.config import settings
from sqlalchemy.orm import Session

engine = get_engine(settings.database)
db = Session(engine)

# Get source root
root = db.query(SourceRoot).first()

# Run scout
scout = Scout(db)
scout.scan_source(root)
