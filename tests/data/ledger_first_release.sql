-- The ledger's tables as the first release made them; never changed, for tests of migrations.
-- Fingerprint 5bb71079323300faeb0dd464339f2758c22a91556f56a3d32844ccc1b99e38b5
CREATE TABLE cf_meta (
    key VARCHAR PRIMARY KEY,
    value VARCHAR NOT NULL
);
CREATE TABLE cf_source_root (
    id BIGINT PRIMARY KEY,
    path VARCHAR NOT NULL UNIQUE,
    type VARCHAR NOT NULL DEFAULT 'local' CHECK (type IN ('local', 'managed')),
    active INTEGER NOT NULL DEFAULT 1 CHECK (active IN (0, 1)),
    settle_seconds DOUBLE,
    include_patterns VARCHAR NOT NULL DEFAULT '[]',
    st_dev BIGINT,
    created_at TIMESTAMP
);
CREATE TABLE cf_file_location (
    id BIGINT PRIMARY KEY,
    source_root_id BIGINT NOT NULL,
    rel_path VARCHAR NOT NULL,
    filename VARCHAR NOT NULL,
    current_version_id BIGINT,
    discovered_time TIMESTAMP NOT NULL,
    last_seen_time TIMESTAMP NOT NULL,
    dev BIGINT NOT NULL DEFAULT 0,
    ino BIGINT NOT NULL DEFAULT 0,
    size BIGINT NOT NULL DEFAULT 0,
    mtime_ns BIGINT NOT NULL DEFAULT 0,
    ctime_ns BIGINT NOT NULL DEFAULT 0,
    hashed_at_us BIGINT NOT NULL DEFAULT 0,
    last_known_size BIGINT GENERATED ALWAYS AS (size) VIRTUAL,
    last_known_mtime DOUBLE GENERATED ALWAYS AS (mtime_ns / 1e9) VIRTUAL,
    deleted_at TIMESTAMP,
    renamed_from VARCHAR,
    UNIQUE (source_root_id, rel_path)
);
CREATE TABLE cf_file_hash_registry (
    content_hash VARCHAR PRIMARY KEY,
    first_seen TIMESTAMP NOT NULL,
    size_bytes BIGINT NOT NULL
);
CREATE TABLE cf_file_version (
    id BIGINT PRIMARY KEY,
    location_id BIGINT NOT NULL,
    seq INTEGER NOT NULL CHECK (seq >= 1),
    content_hash VARCHAR NOT NULL,
    size_bytes BIGINT NOT NULL,
    modified_time TIMESTAMP NOT NULL,
    detected_at TIMESTAMP NOT NULL,
    applied_tags VARCHAR NOT NULL DEFAULT '',
    dev BIGINT NOT NULL DEFAULT 0,
    ino BIGINT NOT NULL DEFAULT 0,
    mtime_ns BIGINT NOT NULL DEFAULT 0,
    ctime_ns BIGINT NOT NULL DEFAULT 0,
    UNIQUE (location_id, seq)
);
CREATE TABLE cf_file_tag (
    file_id BIGINT NOT NULL,
    tag VARCHAR NOT NULL,
    PRIMARY KEY (file_id, tag)
);
CREATE TABLE cf_ignore_rule (
    id BIGINT PRIMARY KEY,
    source_root_id BIGINT,
    pattern VARCHAR NOT NULL,
    active BOOLEAN NOT NULL DEFAULT true,
    created_at TIMESTAMP
);
CREATE TABLE cf_routing_rule (
    id BIGINT PRIMARY KEY,
    pattern VARCHAR NOT NULL,
    tag VARCHAR NOT NULL,
    priority INTEGER NOT NULL DEFAULT 0,
    origin VARCHAR NOT NULL DEFAULT 'user' CHECK (origin IN ('auto', 'user')),
    plugin_name VARCHAR
);
CREATE TABLE cf_plugin_config (
    plugin_name VARCHAR PRIMARY KEY,
    subscription_tags VARCHAR NOT NULL DEFAULT '',
    default_parameters VARCHAR NOT NULL DEFAULT '{}',
    last_updated TIMESTAMP
);
CREATE TABLE cf_plugin_subscription (
    id BIGINT PRIMARY KEY,
    plugin_name VARCHAR NOT NULL,
    topic_name VARCHAR NOT NULL,
    is_active BOOLEAN NOT NULL DEFAULT true,
    UNIQUE (plugin_name, topic_name)
);
CREATE TABLE cf_topic_config (
    id BIGINT PRIMARY KEY,
    plugin_name VARCHAR NOT NULL,
    topic_name VARCHAR NOT NULL,
    uri VARCHAR NOT NULL,
    mode VARCHAR NOT NULL DEFAULT 'append' CHECK (mode IN ('append', 'replace', 'error')),
    schema_json VARCHAR,
    quarantine_allow BOOLEAN NOT NULL DEFAULT false,
    quarantine_max_pct DOUBLE NOT NULL DEFAULT 10.0
        CHECK (quarantine_max_pct BETWEEN 0 AND 100),
    quarantine_max_count BIGINT CHECK (quarantine_max_count >= 0),
    origin VARCHAR NOT NULL DEFAULT 'user' CHECK (origin IN ('auto', 'user')),
    UNIQUE (plugin_name, topic_name)
);
CREATE TABLE cf_processing_queue (
    id BIGINT PRIMARY KEY,
    file_version_id BIGINT,
    plugin_name VARCHAR NOT NULL,
    config_overrides VARCHAR,
    input_file VARCHAR,
    status VARCHAR NOT NULL DEFAULT 'PENDING' CHECK (status IN ('PENDING', 'QUEUED', 'DISPATCHING', 'RUNNING', 'STAGED', 'COMPLETED', 'ABORTED', 'FAILED', 'SKIPPED')),
    priority INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    lease_token VARCHAR,
    lease_owner VARCHAR,
    lease_expires_at TIMESTAMP,
    scheduled_at TIMESTAMP,
    worker_host VARCHAR,
    worker_pid INTEGER,
    claim_time TIMESTAMP,
    end_time TIMESTAMP,
    completion_status VARCHAR CHECK (completion_status IN ('SUCCESS', 'PARTIAL_SUCCESS', 'COMPLETED_WITH_WARNINGS', 'FAILED', 'REJECTED', 'ABORTED', 'SKIPPED')),
    result_summary VARCHAR,
    error_message VARCHAR,
    reason VARCHAR,
    retry_count INTEGER NOT NULL DEFAULT 0 CHECK (retry_count >= 0),
    quarantine_rows BIGINT NOT NULL DEFAULT 0,
    generation INTEGER NOT NULL DEFAULT 0 CHECK (generation >= 0),
    retry_of BIGINT,
    plugin_manifest_id BIGINT,
    pin VARCHAR,
    rehearsal BIGINT CHECK (rehearsal >= 0),
    created_at TIMESTAMP NOT NULL
);
CREATE TABLE cf_journal (
    seq BIGINT NOT NULL,
    job_id BIGINT NOT NULL,
    kind VARCHAR NOT NULL CHECK (kind IN ('LEASED', 'STARTED', 'RETURNED', 'RETRIED', 'GRANTED', 'COMPLETED', 'FAILED', 'ABORTED', 'SKIPPED', 'RELEASED')),
    attempt INTEGER NOT NULL,
    at_us BIGINT NOT NULL,
    data VARCHAR
);
CREATE TABLE cf_output (
    output_key VARCHAR PRIMARY KEY,
    slice_key VARCHAR NOT NULL,
    order_version_seq INTEGER NOT NULL,
    order_manifest_id BIGINT NOT NULL,
    order_generation INTEGER NOT NULL,
    job_id BIGINT NOT NULL,
    token VARCHAR NOT NULL,
    n INTEGER NOT NULL,
    topic VARCHAR NOT NULL,
    kind VARCHAR NOT NULL CHECK (kind IN ('output', 'quarantine')),
    mode VARCHAR NOT NULL CHECK (mode IN ('append', 'replace', 'error')),
    sink_uri VARCHAR NOT NULL,
    root_id VARCHAR NOT NULL,
    stage VARCHAR NOT NULL,
    final VARCHAR NOT NULL,
    "rows" BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    sha256 VARCHAR NOT NULL,
    state VARCHAR NOT NULL DEFAULT 'GRANTED' CHECK (state IN ('GRANTED', 'PUBLISHED', 'ABANDONED')),
    granted_at TIMESTAMP NOT NULL
);
CREATE TABLE cf_slice (
    slice_key VARCHAR PRIMARY KEY,
    order_version_seq INTEGER NOT NULL,
    order_manifest_id BIGINT NOT NULL,
    order_generation INTEGER NOT NULL,
    output_key VARCHAR NOT NULL,
    job_id BIGINT NOT NULL
);
CREATE TABLE cf_dead_letter (
    original_job_id BIGINT PRIMARY KEY,
    file_version_id BIGINT,
    plugin_name VARCHAR NOT NULL,
    reason VARCHAR NOT NULL,
    error_message VARCHAR,
    retry_count INTEGER NOT NULL,
    moved_at TIMESTAMP NOT NULL,
    replayed_as BIGINT
);
CREATE TABLE cf_plugin_health (
    plugin_name VARCHAR PRIMARY KEY,
    consecutive_failures INTEGER NOT NULL DEFAULT 0,
    paused BOOLEAN NOT NULL DEFAULT false,
    reason VARCHAR NOT NULL DEFAULT '',
    updated_at TIMESTAMP NOT NULL
);
CREATE TABLE cf_job_log (
    job_id BIGINT NOT NULL,
    attempt INTEGER NOT NULL,
    log VARCHAR NOT NULL
);
CREATE TABLE cf_scan (
    id BIGINT PRIMARY KEY,
    source_root_id BIGINT NOT NULL,
    started_at TIMESTAMP NOT NULL,
    finished_at TIMESTAMP,
    complete BOOLEAN,
    report_json VARCHAR
);
CREATE TABLE cf_worker_node (
    hostname VARCHAR NOT NULL,
    pid INTEGER NOT NULL,
    ip_address VARCHAR,
    env_signature VARCHAR,
    started_at TIMESTAMP,
    last_heartbeat TIMESTAMP,
    status VARCHAR NOT NULL DEFAULT 'ACTIVE' CHECK (status IN ('ACTIVE', 'DRAINING', 'GONE')),
    current_job_id BIGINT,
    PRIMARY KEY (hostname, pid)
);
CREATE TABLE cf_publisher (
    id BIGINT PRIMARY KEY,
    azure_oid VARCHAR UNIQUE,
    name VARCHAR NOT NULL,
    email VARCHAR,
    created_at TIMESTAMP,
    last_active TIMESTAMP
);
CREATE TABLE cf_plugin_environment (
    hash VARCHAR PRIMARY KEY,
    lockfile_content VARCHAR NOT NULL,
    size_mb DOUBLE NOT NULL DEFAULT 0,
    last_used TIMESTAMP,
    created_at TIMESTAMP
);
CREATE TABLE cf_plugin_manifest (
    id BIGINT PRIMARY KEY,
    plugin_name VARCHAR NOT NULL,
    version VARCHAR NOT NULL,
    source_code VARCHAR NOT NULL,
    source_hash VARCHAR NOT NULL,
    status VARCHAR NOT NULL DEFAULT 'PENDING' CHECK (status IN ('PENDING', 'STAGING', 'ACTIVE', 'SUPERSEDED', 'REJECTED')),
    envelope VARCHAR,
    signer VARCHAR,
    key_id VARCHAR,
    validation_error VARCHAR,
    created_at TIMESTAMP NOT NULL,
    deployed_at TIMESTAMP,
    env_hash VARCHAR,
    artifact_hash VARCHAR NOT NULL,
    publisher_id BIGINT,
    system_requirements VARCHAR,
    manifest_json VARCHAR,
    wiring_json VARCHAR,
    samples_json VARCHAR,
    UNIQUE (plugin_name, version, artifact_hash)
);
CREATE TABLE cf_library_whitelist (
    id BIGINT PRIMARY KEY,
    library_name VARCHAR NOT NULL UNIQUE,
    version_constraint VARCHAR,
    description VARCHAR,
    added_at TIMESTAMP
);
CREATE TABLE cf_api_jobs (
    job_id BIGINT PRIMARY KEY,
    job_type VARCHAR NOT NULL CHECK (job_type IN ('run', 'backtest', 'preview')),
    status VARCHAR NOT NULL CHECK (status IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
    plugin_name VARCHAR NOT NULL,
    plugin_version VARCHAR,
    input_dir VARCHAR NOT NULL,
    output_sink VARCHAR,
    approval_id VARCHAR,
    created_at TIMESTAMP NOT NULL,
    started_at TIMESTAMP,
    finished_at TIMESTAMP,
    error_message VARCHAR,
    progress_phase VARCHAR,
    progress_items_done BIGINT CHECK (progress_items_done >= 0),
    progress_items_total BIGINT CHECK (progress_items_total >= 0),
    progress_message VARCHAR,
    result_rows_processed BIGINT CHECK (result_rows_processed >= 0),
    result_bytes_written BIGINT CHECK (result_bytes_written >= 0),
    result_outputs_json VARCHAR,
    result_metrics_json VARCHAR,
    spec_json VARCHAR,
    preview_json VARCHAR,
    events_removed_to BIGINT NOT NULL DEFAULT 0
);
CREATE TABLE cf_api_events (
    id BIGINT PRIMARY KEY,
    event_id BIGINT NOT NULL CHECK (event_id >= 1),
    job_id BIGINT NOT NULL,
    event_type VARCHAR NOT NULL CHECK (event_type IN ('job_started', 'phase', 'progress', 'violation', 'output', 'job_finished', 'approval_required')),
    "timestamp" TIMESTAMP NOT NULL,
    payload_json VARCHAR NOT NULL,
    UNIQUE (job_id, event_id)
);
CREATE TABLE cf_api_approvals (
    approval_id VARCHAR PRIMARY KEY,
    status VARCHAR NOT NULL CHECK (status IN ('pending', 'approved', 'rejected', 'expired', 'stale')),
    operation_type VARCHAR NOT NULL CHECK (operation_type IN ('run', 'schema_promote')),
    operation_json VARCHAR NOT NULL,
    summary VARCHAR NOT NULL,
    created_at TIMESTAMP NOT NULL,
    expires_at TIMESTAMP NOT NULL,
    decided_at TIMESTAMP,
    decided_by VARCHAR,
    rejection_reason VARCHAR,
    job_id BIGINT,
    requester VARCHAR,
    binding_json VARCHAR,
    digest VARCHAR,
    stale_reason VARCHAR
);
CREATE TABLE cf_api_tasks (
    api_job_id BIGINT NOT NULL,
    job_id BIGINT NOT NULL,
    own BOOLEAN NOT NULL,
    told BOOLEAN NOT NULL DEFAULT false,
    PRIMARY KEY (api_job_id, job_id)
);
