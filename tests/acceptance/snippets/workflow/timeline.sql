SELECT
    l.rel_path,
    v.id as version_id,
    v.content_hash,
    v.size_bytes,
    v.detected_at,
    COUNT(j.id) as jobs_processed
FROM cf_file_location l
JOIN cf_file_version v ON v.location_id = l.id
LEFT JOIN cf_processing_queue j ON j.file_version_id = v.id
GROUP BY l.rel_path, v.id
ORDER BY l.rel_path, v.detected_at;
