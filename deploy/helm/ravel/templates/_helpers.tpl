{{/* The names of things. */}}
{{- define "ravel.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "ravel.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "ravel.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "ravel.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "ravel.configMap" -}}
{{- default (include "ravel.fullname" .) .Values.documents.existingConfigMap -}}
{{- end -}}

{{- define "ravel.gossipSecret" -}}
{{- default (printf "%s-gossip" (include "ravel.fullname" .)) .Values.gossip.existingSecret -}}
{{- end -}}

{{- define "ravel.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Labels of a component: (list ROOT COMPONENT). Pods have those that select them only: others would restart them. */}}
{{- define "ravel.selector" -}}
app.kubernetes.io/name: {{ include "ravel.name" (index . 0) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "ravel.labels" -}}
{{ include "ravel.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
{{- end -}}

{{/* metadata of an object: (list ROOT COMPONENT NAME). */}}
{{- define "ravel.metadata" -}}
name: {{ index . 2 }}
namespace: {{ (index . 0).Release.Namespace }}
labels:
  {{- include "ravel.labels" . | nindent 2 }}
{{- end -}}

{{/* That of a hook, of which nothing is left when it is done: (list ROOT COMPONENT NAME EVENTS WEIGHT). */}}
{{- define "ravel.hookMetadata" -}}
{{ include "ravel.metadata" . }}
{{- if (index . 0).Values.hooks }}
annotations:
  helm.sh/hook: {{ index . 3 }}
  helm.sh/hook-weight: {{ index . 4 | quote }}
  helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
{{- end -}}

{{/* Where the process answers the kubelet. */}}
{{- define "ravel.listen" -}}
{{- default "127.0.0.1:10234" .Values.metrics.listen -}}
{{- end -}}

{{/* Arguments: (list FIRST ... SETTINGS). A list is a flag for each of its values; numbers are whole ones. */}}
{{- define "ravel.args" -}}
args:
  {{- range initial . }}
  - {{ . }}
  {{- end }}
  {{- range $name, $value := last . }}
  {{- range kindIs "slice" $value | ternary $value (list $value) }}
  - {{ printf "--%s=%s" $name (kindIs "float64" . | ternary (. | int64 | toString) (toString .)) | quote }}
  {{- end }}
  {{- end }}
{{- end -}}

{{/* The settings of a role: (list ROOT ROLE). */}}
{{- define "ravel.settings" -}}
{{- $root := index . 0 -}}
{{- mergeOverwrite dict ($root.Values.settings | default dict) ((index $root.Values (index . 1)).settings | default dict) | toJson -}}
{{- end -}}

{{/* A duration of Go in seconds, rounded up. */}}
{{- define "ravel.seconds" -}}
{{- $seconds := dict "ns" 1e-9 "us" 1e-6 "µs" 1e-6 "ms" 1e-3 "s" 1.0 "m" 60.0 "h" 3600.0 -}}
{{- $sum := 0.0 -}}
{{- range regexFindAll "[0-9.]+[a-zµ]+" . -1 -}}
{{- $unit := regexFind "[a-zµ]+" . -}}
{{- $sum = addf $sum (mulf (trimSuffix $unit . | float64) (index $seconds $unit)) -}}
{{- end -}}
{{- ceil $sum | int -}}
{{- end -}}

{{/* A planned stop takes the wait, and at most 10 s; the kubelet may kill 5 s later. */}}
{{- define "ravel.grace" -}}
{{- $wait := include "ravel.seconds" (index . "stop-wait" | default "1s") | int -}}
{{- if gt $wait 8 -}}
{{- fail (printf "director.settings.stop-wait: %s: want 8s at most" (index . "stop-wait")) -}}
{{- end -}}
{{- add $wait 15 -}}
{{- end -}}

{{/* What the pods of all components have. */}}
{{- define "ravel.anyPod" -}}
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "ravel.containerImage" -}}
image: {{ include "ravel.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}

{{/* What of the host's files a role works with. */}}
{{- define "ravel.hostVolumes" -}}
- name: run
  hostPath: {path: /run/ravel, type: DirectoryOrCreate}
- name: state
  hostPath: {path: /var/lib/ravel, type: DirectoryOrCreate}
- name: xtables-lock
  hostPath: {path: /run/xtables.lock, type: FileOrCreate}
{{- end -}}

{{- define "ravel.hostMounts" -}}
- {name: run, mountPath: /run/ravel}
- {name: state, mountPath: /var/lib/ravel}
- {name: xtables-lock, mountPath: /run/xtables.lock}
{{- end -}}

{{/* A process that only asks the API server, or waits. */}}
{{- define "ravel.plainSecurity" -}}
runAsUser: 65534
runAsGroup: 65534
runAsNonRoot: true
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* What the pods of Jobs have. */}}
{{- define "ravel.linux" -}}
{{- merge dict (. | default dict) (dict "kubernetes.io/os" "linux") | toYaml -}}
{{- end -}}

{{- define "ravel.jobPod" -}}
{{ include "ravel.anyPod" . }}
automountServiceAccountToken: true
restartPolicy: OnFailure
nodeSelector:
  {{- include "ravel.linux" .Values.jobs.nodeSelector | nindent 2 }}
{{- with .Values.jobs.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
