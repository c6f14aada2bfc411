{{/* The TOML of `lossd serve`, and what else follows from how it listens. */}}

{{- define "lossd.socket" -}}unix:///run/lossd/lossd.sock{{- end }}

{{- define "lossd.hostPort" -}}
{{- $host := ternary (printf "[%s]" .Values.host) .Values.host (contains ":" .Values.host) }}
{{- printf "%s:%d" $host (int .Values.ports.grpc) }}
{{- end }}

{{/* The kubelet's gRPC probes speak no TLS and know no Unix sockets: a command in the container asks there, over the socket. */}}
{{- define "lossd.hasSocket" -}}
{{- if or (eq .Values.mode "sidecar") .Values.tls.enabled }}true{{ end }}
{{- end }}

{{- define "lossd.listen" -}}
{{- $listen := list }}
{{- if eq .Values.mode "server" }}{{ $listen = append $listen (include "lossd.hostPort" .) }}{{ end }}
{{- if include "lossd.hasSocket" . }}{{ $listen = append $listen (include "lossd.socket" .) }}{{ end }}
{{- toJson $listen }}
{{- end }}

{{/* JSON of numbers, strings, booleans and lists is TOML too, and writes whole numbers without a fraction. */}}
{{- define "lossd.toml" -}}
listen = {{ include "lossd.listen" . }}
metrics_host = {{ toJson .Values.host }}
metrics_port = {{ int .Values.ports.metrics }}
drain_seconds = {{ toJson .Values.drain.seconds }}
{{- if .Values.tls.enabled }}
tls_cert = "/etc/lossd/tls/tls.crt"
tls_key = "/etc/lossd/tls/tls.key"
{{- if .Values.tls.clientCertificates }}
tls_client_ca = {{ printf "/etc/lossd/tls/%s" .Values.tls.clientCaKey | toJson }}
{{- end }}
{{- end }}
{{- if and (eq .Values.mode "server") (not .Values.tls.enabled) }}
insecure = true
{{- end }}
{{- if .Values.tokens.secretName }}
tokens = {{ printf "/etc/lossd/tokens/%s" .Values.tokens.key | toJson }}
{{- end }}
{{- range $name, $value := merge (dict) .Values.config (dict "log_format" "json") }}
{{ $name }} = {{ toJson $value }}
{{- end }}
{{ end }}

{{/* Drain, closing, and in a Deployment the time in which balancers hear of it. */}}
{{- define "lossd.graceSeconds" -}}
{{- $drain := addf .Values.drain.seconds .Values.drain.marginSeconds }}
{{- if eq .Values.mode "server" }}
{{- ceil (addf $drain .Values.drain.preStopSeconds) }}
{{- else }}
{{- ceil (addf $drain .Values.trainer.terminationGraceSeconds) }}
{{- end }}
{{- end }}
