{{/*
All names of objects. One installation for each namespace, whatever the release is called: workers
find the Sentinel, and a later install the ledger's volume, by these names. Objects of the whole
cluster carry the namespace, but for those that installations share (CRDs, admission policies,
roles for people).
*/}}

{{- define "casparian.operator.name" -}}casparian-operator{{- end }}
{{- define "casparian.sentinel.name" -}}casparian-sentinel{{- end }}
{{- define "casparian.settings.name" -}}casparian-settings{{- end }}
{{- define "casparian.ledger.volume" -}}ledger{{- end }}
{{- define "casparian.reviewer.name" -}}casparian-tokenreviews-{{ .Release.Namespace }}{{- end }}
{{- define "casparian.backup.name" -}}casparian-backup{{- end }}
{{- define "casparian.backup.claim" -}}{{ .Values.backup.storage.existingClaim | default (include "casparian.backup.name" .) }}{{- end }}
{{- define "casparian.alerts.name" -}}casparian-alerts{{- end }}
{{- define "casparian.dashboard.name" -}}casparian-dashboard{{- end }}
{{- define "casparian.deny.name" -}}casparian-default-deny{{- end }}
{{- define "casparian.uninstall.name" -}}casparian-uninstall{{- end }}
{{- define "casparian.test.name" -}}casparian-test{{- end }}
{{- define "casparian.workers.name" -}}casparian-workers{{- end }}
{{- define "casparian.stamp.name" -}}casparian-stamp{{- end }}
{{- define "casparian.mcp.name" -}}casparian-mcp{{- end }}
{{- define "casparian.mcp.reviewer.name" -}}casparian-mcp-tokenreviews-{{ .Release.Namespace }}{{- end }}
