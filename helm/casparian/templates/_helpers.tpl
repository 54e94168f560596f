{{/* Labels of every object. Takes a list: context, component. */}}
{{- define "casparian.labels" -}}
{{- $top := index . 0 -}}
helm.sh/chart: {{ $top.Chart.Name }}-{{ $top.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
app.kubernetes.io/instance: {{ $top.Release.Name }}
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
{{ include "casparian.selector" . }}
{{- end }}

{{/* What selects the pods of a component; never changes. */}}
{{- define "casparian.selector" -}}
app.kubernetes.io/name: casparian
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Namespaces that are looked after, as a JSON list. */}}
{{- define "casparian.watched" -}}
{{ .Values.watchNamespaces | default (list .Release.Namespace) | uniq | toJson }}
{{- end }}

{{/* An image. Takes a list: context, image. */}}
{{- define "casparian.image" -}}
{{- $image := index . 1 -}}
{{- $tag := $image.tag | default (index . 0).Chart.AppVersion -}}
{{ $image.repository }}{{ hasPrefix "sha256:" $tag | ternary "@" ":" }}{{ $tag }}
{{- end }}

{{- define "casparian.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Which nodes the chart's own pods run on. */}}
{{- define "casparian.placement" -}}
{{- with .Values.operator.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.operator.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.operator.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Pod Security "restricted", for every pod. The group owns the volumes. */}}
{{- define "casparian.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "casparian.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* A StorageClass, if one is given; "-" stands for none at all. */}}
{{- define "casparian.storageClass" -}}
{{- if eq . "-" }}
storageClassName: ""
{{- else if . }}
storageClassName: {{ . }}
{{- end }}
{{- end }}

{{/* How a container finds its settings. */}}
{{- define "casparian.settingsEnv" -}}
- {name: CASPARIAN_CONFIG, value: /etc/casparian/config.toml}
- {name: HOME, value: /tmp}
{{- end }}

{{/*
config.toml, in two parts: what a running operator reads anew by itself when it changes, and the
rest, whose change restarts the pod. JSON's text, lists and numbers are TOML's, too.
*/}}
{{- define "casparian.settings" -}}
[database]
db_location = "/var/lib/casparian/ledger.duckdb"
memory_limit_mb = {{ int .Values.ledger.memoryLimitMb }}

[sentinel]
bind_address = "tcp://0.0.0.0:5555"
{{- with .Values.sentinel }}
lease_ttl_seconds = {{ toJson .leaseTtlSeconds }}
heartbeat_seconds = {{ toJson .heartbeatSeconds }}
max_retries = {{ int .maxRetries }}
retry_base_seconds = {{ toJson .retryBaseSeconds }}
breaker_failures = {{ int .breakerFailures }}
{{- end }}

[worker]
{{- with .Values.worker }}
slots = {{ int .slots }}
job_timeout_seconds = {{ toJson .jobTimeoutSeconds }}
memory_mb = {{ int .memoryMb }}
pids = {{ int .pids }}
log_kb = {{ int .logKb }}
recycle_after = {{ int .recycleAfter }}
{{- end }}

{{- if kindIs "slice" .Values.worker.sandboxRequire }}

[sandbox]
require = {{ toJson .Values.worker.sandboxRequire }}
{{- end }}

[logging]
level = {{ toJson .Values.logging.level }}
format = {{ toJson .Values.logging.format }}

[approvals]
allow_self = false

[retention]
{{- with .Values.retention }}
api_job_hours = {{ toJson .apiJobHours }}
api_event_hours = {{ toJson .apiEventHours }}
job_hours = {{ toJson .jobHours }}
version_hours = {{ toJson .versionHours }}
dead_letter_hours = {{ toJson .deadLetterHours }}
{{- end }}

{{- with .Values.sinks.mssql }}
{{- if .server }}

[sinks.mssql]
server = {{ toJson .server }}
port = {{ int .port }}
user = {{ toJson .user }}
database = {{ toJson .database }}
{{- end }}
{{- end }}

[operator]
namespace = {{ toJson .Release.Namespace }}
watch_namespaces = {{ include "casparian.watched" . }}
sentinel_host = "{{ include "casparian.sentinel.name" . }}.{{ .Release.Namespace }}.svc"
listen_host = "0.0.0.0"
health_port = 8080
metrics_port = 9090
resync_seconds = {{ toJson .Values.operator.resyncSeconds }}
kept_versions = {{ int .Values.operator.keptVersions }}
worker_image = {{ include "casparian.image" (list . .Values.worker.image) | toJson }}
image_pull_policy = {{ toJson .Values.worker.image.pullPolicy }}
image_pull_secrets = {{ toJson .Values.imagePullSecrets }}
network_policies = {{ .Values.networkPolicies.enabled }}
scratch_size = {{ toJson .Values.worker.scratchSize }}
backup_account = {{ .Values.backup.enabled | ternary (include "casparian.backup.name" .) "" | toJson }}
mcp_account = {{ .Values.mcp.enabled | ternary (include "casparian.mcp.name" .) "" | toJson }}
{{- with .Values.environments }}
environments_storage_class = {{ toJson .storageClassName }}
environments_size = {{ toJson .size }}
index_url = {{ toJson .indexUrl }}
index_ca_config_map = {{ toJson .caConfigMap }}
wheelhouse_claim = {{ toJson .wheelhouseClaim }}
{{- end }}
{{- range $kind, $amounts := .Values.worker.resources }}
{{- with $amounts }}

[operator.worker_resources.{{ $kind }}]
{{- range $name, $amount := . }}
{{ toJson $name }} = {{ toString $amount | toJson }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* config.toml of the MCP server. */}}
{{- define "casparian.mcp.settings" -}}
[sentinel]
control_address = "tcp://{{ include "casparian.sentinel.name" . }}.{{ .Release.Namespace }}.svc:5556"

[wire]
curve_dir = "/var/run/casparian/curve"

[logging]
level = {{ toJson .Values.logging.level }}
format = {{ toJson .Values.logging.format }}

[worker]
output_root = "/outputs"

[mcp]
host = "0.0.0.0"
port = 8765
audit_log = "/var/log/casparian/mcp_audit.ndjson"
token_review = true
{{- with .Values.mcp }}
token_audiences = {{ toJson .audiences }}
allowed_users = {{ toJson .allowedUsers }}
allowed_groups = {{ toJson .allowedGroups }}
redaction = {{ toJson .redaction }}
approval_minutes = {{ toJson .approvalMinutes }}
{{- end }}
{{- end }}

{{- define "casparian.trust" -}}
[trust]
{{- with .Values.trust }}
allowed_signers = {{ toJson .allowedSigners }}
allow_unsigned = {{ .allowUnsigned }}
gatekeeper = {{ toJson .gatekeeper }}
libraries = {{ toJson .libraries }}
{{- range $signer, $keys := .keys }}
{{- range $keys }}

[[trust.keys.{{ toJson $signer }}]]
public = {{ toJson .public }}
{{- with .scopes }}
scopes = {{ toJson . }}
{{- end }}
{{- with .notBefore }}
not_before = {{ toJson . }}
{{- end }}
{{- with .notAfter }}
not_after = {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}
{{- with .revoked }}

[trust.revoked]
{{- range $key, $reason := . }}
{{ toJson $key }} = {{ toJson $reason }}
{{- end }}
{{- end }}
{{- with .azure }}
{{- if or .tenantId .clientId .authority .group }}

[trust.azure]
tenant_id = {{ toJson .tenantId }}
client_id = {{ toJson .clientId }}
authority = {{ toJson .authority }}
group = {{ toJson .group }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* NetworkPolicy rules. */}}
{{- define "casparian.dnsEgress" -}}
ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
{{- end }}

{{- define "casparian.apiServerEgress" -}}
to:
  {{- range .Values.networkPolicies.apiServer.cidrs }}
  - ipBlock: {cidr: {{ . | quote }}}
  {{- end }}
ports:
  {{- range .Values.networkPolicies.apiServer.ports }}
  - {port: {{ int . }}}
  {{- end }}
{{- end }}

{{- define "casparian.sentinelEgress" -}}
to:
  - podSelector:
      matchLabels:
        {{- include "casparian.selector" (list . "operator") | nindent 8 }}
{{- end }}

{{/* The newest API in which MutatingAdmissionPolicies are served here; empty if none is. */}}
{{- define "casparian.mutatingApi" -}}
{{- if eq .Values.admissionPolicies.stamp "auto" }}
{{- range list "v1" "v1beta1" }}
{{- $api := printf "admissionregistration.k8s.io/%s" . }}
{{- if $.Capabilities.APIVersions.Has (printf "%s/MutatingAdmissionPolicy" $api) }}
{{- $api }}{{ break }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Whether a webhook writes who decides; "" for no. */}}
{{- define "casparian.stamp.wanted" -}}
{{- if and .Values.admissionPolicies.install (not (include "casparian.mutatingApi" .)) }}true{{ end }}
{{- end }}

{{/*
Refuses a second installation, with the name of the first. Looks only at what this release would
make; helm refuses as well, but one object at a time and without saying what to do.
*/}}
{{- define "casparian.onlyOne" -}}
{{- $wanted := list }}
{{- if .Values.crds.install }}
{{- $wanted = append $wanted (list "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" "casparianplugins.casparian.io") }}
{{- end }}
{{- if .Values.admissionPolicies.install }}
{{- $wanted = append $wanted (list "admissionregistration.k8s.io/v1" "ValidatingAdmissionPolicy" "" "casparian-approval-guard") }}
{{- end }}
{{- if .Values.rbac.install }}
{{- range include "casparian.watched" . | fromJsonArray }}
{{- $wanted = append $wanted (list "rbac.authorization.k8s.io/v1" "Role" . (include "casparian.operator.name" $)) }}
{{- end }}
{{- end }}
{{- range $wanted }}
{{- $found := lookup (index . 0) (index . 1) (index . 2) (index . 3) }}
{{- if $found }}
{{- $notes := $found.metadata.annotations | default dict }}
{{- $release := get $notes "meta.helm.sh/release-name" }}
{{- $space := get $notes "meta.helm.sh/release-namespace" }}
{{- if and $release (or (ne $release $.Release.Name) (ne $space $.Release.Namespace)) }}
{{- fail (printf "\n\nCasparian Flow is installed already: %s %s is of release %q in namespace %q, and one installation serves a cluster.\nAdd your namespaces to watchNamespaces of that release instead. If it was uninstalled, docs/install-kubernetes.md tells how to take over what it left (\"One installation serves one cluster\").\n" (index . 1) (index . 3) $release $space) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
