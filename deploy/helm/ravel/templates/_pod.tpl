{{/* The pod of a role: (list ROOT ROLE). */}}
{{- define "ravel.pod" -}}
{{- $ := index . 0 -}}
{{- $role := index . 1 -}}
{{- $values := index $.Values $role -}}
{{- $settings := include "ravel.settings" . | fromJson -}}
{{- $listen := include "ravel.listen" $ -}}
metadata:
  labels:
    {{- include "ravel.selector" . | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "ravel.fullname" $ }}-{{ $role }}
  automountServiceAccountToken: true
  {{- include "ravel.anyPod" $ | nindent 2 }}
  # The host's network is what is worked on.
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  # There is no preStop hook: SIGTERM itself is the planned stop, after which the kernel serves on.
  terminationGracePeriodSeconds: {{ include "ravel.grace" $settings }}
  securityContext:
    runAsUser: 0
    seccompProfile: {type: RuntimeDefault}
    {{- with $.Values.seLinuxOptions }}
    seLinuxOptions:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  affinity:
    nodeAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        nodeSelectorTerms:
          - matchExpressions:
              - key: {{ $.Values.director.nodeLabel }}
                operator: {{ eq $role "director" | ternary "Exists" "DoesNotExist" }}
    {{- if and (eq $role "director") (eq $values.kind "Deployment") }}
    podAntiAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "ravel.selector" . | nindent 14 }}
    {{- end }}
  nodeSelector:
    {{- include "ravel.linux" $values.nodeSelector | nindent 4 }}
  {{- with $values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  initContainers:
    # The one privileged part: it loads modules and sets what of /proc/sys the process itself cannot write.
    - name: host
      {{- include "ravel.containerImage" $ | nindent 6 }}
      {{- $looks := pick $settings "bgp-port" "gossip-listen" "health-listen" "iptables" "iptables-chain" "link" "count-packets" }}
      {{- include "ravel.args" (list "check" "--host" "--fix" (print "--role=" $role) (print "--listen=" $listen) $looks) | nindent 6 }}
      env:
        - name: RAVEL_NODE
          valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
      securityContext:
        privileged: true
        readOnlyRootFilesystem: true
      {{- with $values.resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "ravel.hostMounts" $ | nindent 8 }}
        - {name: modules, mountPath: /lib/modules, readOnly: true}
        # The host's options of modules, such as ip_vs conn_tab_bits.
        - {name: modprobe, mountPath: /etc/modprobe.d, readOnly: true}
  containers:
    - name: {{ $role }}
      {{- include "ravel.containerImage" $ | nindent 6 }}
      {{- $own := list $role (print "--config-namespace=" $.Release.Namespace) (print "--config-name=" (include "ravel.configMap" $)) }}
      {{- $own = concat $own (list (print "--config-key=" $.Values.documents.clusterKey) (print "--fleet-key=" $.Values.documents.fleetKey)) }}
      {{- $own = concat $own (list "--gossip-key-file=/etc/ravel/gossip/gossip.key" (print "--listen=" $listen)) }}
      {{- include "ravel.args" (append $own $settings) | nindent 6 }}
      env:
        - name: RAVEL_NODE
          valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
        - name: RAVEL_GOSSIP_ADVERTISE
          valueFrom: {fieldRef: {fieldPath: status.hostIP}}
      securityContext:
        readOnlyRootFilesystem: true
        allowPrivilegeEscalation: false
        capabilities:
          drop: [ALL]
          {{- /* A port below 1024 takes a right of its own. */}}
          {{- $low := or (and (gt (int (get $settings "bgp-port")) 0) (lt (int (get $settings "bgp-port")) 1024)) (lt (regexFind "[0-9]+$" $listen | int) 1024) }}
          add: [NET_ADMIN, NET_RAW{{ if $low }}, NET_BIND_SERVICE{{ end }}]
      {{- range $probe, $path := dict "startup" "/healthz" "liveness" "/healthz" "readiness" "/readyz" }}
      {{ $probe }}Probe:
        httpGet: {host: 127.0.0.1, port: {{ regexFind "[0-9]+$" $listen }}, path: {{ $path }}}
        {{- toYaml (index $.Values.probes $probe) | nindent 8 }}
      {{- end }}
      {{- with $values.resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        {{- include "ravel.hostMounts" $ | nindent 8 }}
        {{- if eq $role "director" }}
        - {name: expire-nodest-conn, mountPath: /host/proc/sys/net/ipv4/vs/expire_nodest_conn}
        {{- end }}
        # A directory, not a file of it: so a change of the Secret arrives.
        - {name: gossip, mountPath: /etc/ravel/gossip, readOnly: true}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "ravel.hostVolumes" $ | nindent 4 }}
    - name: modules
      hostPath: {path: /lib/modules}
    - name: modprobe
      hostPath: {path: /etc/modprobe.d, type: DirectoryOrCreate}
    {{- if eq $role "director" }}
    # The one setting that changes while a director works: for the moment in which a real server leaves a UDP service. It is
    # there when the module is, which the init container loads: so it has no type that would be looked at before.
    - name: expire-nodest-conn
      hostPath: {path: /proc/sys/net/ipv4/vs/expire_nodest_conn}
    {{- end }}
    - name: gossip
      secret: {secretName: {{ include "ravel.gossipSecret" $ }}, defaultMode: 0400}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
