{{/* The server's container and what a pod around it needs; the same in a Deployment and beside a trainer. */}}

{{- define "lossd.probe" -}}
{{- if include "lossd.hasSocket" .root -}}
exec:
  command: [lossd, health, {{ include "lossd.socket" .root | quote }}, --service, {{ .service | quote }}]
{{- else -}}
grpc:
  port: {{ .root.Values.ports.grpc }}
  service: {{ .service | quote }}
{{- end }}
{{ toYaml .timing }}
{{- end }}

{{- define "lossd.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end }}

{{- define "lossd.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.user }}
runAsGroup: {{ .Values.user }}
fsGroup: {{ .Values.user }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "lossd.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if gt (int .Values.gpu.count) 0 }}
{{- $resources = mergeOverwrite $resources (dict "limits" (dict .Values.gpu.resource .Values.gpu.count)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "lossd.container" -}}
name: lossd
image: {{ include "lossd.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args: [serve, --config, /etc/lossd/config/lossd.toml]
{{- with .Values.extraEnv }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  {{- if eq .Values.mode "server" }}
  - name: grpc
    containerPort: {{ .Values.ports.grpc }}
  {{- end }}
  - name: metrics
    containerPort: {{ .Values.ports.metrics }}
startupProbe:
  {{- include "lossd.probe" (dict "root" . "service" "lossd.v1.LossService" "timing" .Values.probes.startup) | nindent 2 }}
readinessProbe:
  {{- include "lossd.probe" (dict "root" . "service" "lossd.v1.LossService" "timing" .Values.probes.readiness) | nindent 2 }}
livenessProbe:
  {{- include "lossd.probe" (dict "root" . "service" "" "timing" .Values.probes.liveness) | nindent 2 }}
resources:
  {{- include "lossd.resources" . | nindent 2 }}
securityContext:
  {{- include "lossd.containerSecurity" . | nindent 2 }}
  readOnlyRootFilesystem: true
volumeMounts:
  - name: config
    mountPath: /etc/lossd/config
    readOnly: true
  - name: cache
    mountPath: /var/cache/lossd
  - name: tmp
    mountPath: /tmp
  {{- if include "lossd.hasSocket" . }}
  - name: socket
    mountPath: /run/lossd
  {{- end }}
  {{- if .Values.tls.enabled }}
  - name: tls
    mountPath: /etc/lossd/tls
    readOnly: true
  {{- end }}
  {{- if .Values.tokens.secretName }}
  - name: tokens
    mountPath: /etc/lossd/tokens
    readOnly: true
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{- define "lossd.volumes" -}}
- name: config
  configMap:
    name: {{ include "lossd.fullname" . }}
- name: cache
  emptyDir:
    sizeLimit: {{ .Values.cacheSize }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmpSize }}
{{- if include "lossd.hasSocket" . }}
# Only sockets: shared memory is passed through them and lies in no file.
- name: socket
  emptyDir:
    medium: Memory
    sizeLimit: 1Mi
{{- end }}
{{- if .Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ required "tls.secretName: is empty, want the Secret with tls.crt and tls.key" .Values.tls.secretName }}
    defaultMode: 0440
{{- end }}
{{- with .Values.tokens.secretName }}
- name: tokens
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "lossd.podMetadata" -}}
labels:
  {{- include "lossd.labels" . | nindent 2 }}
  {{- with .Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  # A change of the settings makes new pods.
  checksum/config: {{ include "lossd.toml" . | sha256sum }}
  {{- with .Values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* What the scheduler and the kubelet read of a pod, whatever runs in it. */}}
{{- define "lossd.podFrame" -}}
serviceAccountName: {{ include "lossd.serviceAccountName" . }}
automountServiceAccountToken: false
# A Service called lossd would otherwise come as variables LOSSD_…, which are the server's settings.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "lossd.graceSeconds" . }}
securityContext:
  {{- include "lossd.podSecurity" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .Values.gpu.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  {{- include "lossd.volumes" . | nindent 2 }}
{{- end }}
