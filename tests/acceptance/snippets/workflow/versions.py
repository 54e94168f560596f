from casparian_flow.db.access import get_engine
from casparian_flow.db.models import FileLocation, FileVersion
from casparian_flow.config import settings
from sqlalchemy.orm import Session

engine = get_engine(settings.database)
db = Session(engine)

# Get all versions for a specific file
location = db.query(FileLocation).filter_by(rel_path='data/finance.csv').first()
versions = db.query(FileVersion).filter_by(location_id=location.id).order_by(FileVersion.detected_at).all()

for v in versions:
    print(f"Version {v.id}: Hash={v.content_hash[:8]}..., Detected={v.detected_at}")
